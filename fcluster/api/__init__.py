"""What users import: `Job`, its streams and contexts. Also loads job files."""
