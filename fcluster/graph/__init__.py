"""What a job is: topics, stages, operators, codecs and kinds of state, and which changes to it are
compatible. Pure.
"""
