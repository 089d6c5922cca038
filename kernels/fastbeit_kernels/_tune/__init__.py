"""The tuning command's parts (``tune.py``): candidates, problems, timing."""
