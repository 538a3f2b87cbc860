"""Odd jobs on odd inputs: the real processing beside a slow, obvious interpreter of the same job."""
