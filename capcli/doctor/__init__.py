"""`capcli doctor`: installed versions, what this machine and its runtimes can do, local models, and a fix for each problem."""
