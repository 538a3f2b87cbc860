"""Odd jobs on odd inputs: the real processing compared with a slow, obvious interpreter of the same job."""
