"""What users import: `Job`, its streams and contexts. And how a job file is loaded."""
