"""What a job is: topics, stages, operators, codecs, kinds of state; which jobs can go on from which. Pure."""
