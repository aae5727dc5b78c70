"""`capcli doctor`: what is installed, what this machine can do, what lies on its disk, and what mends what is missing."""
