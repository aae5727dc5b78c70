"""`capcli export`: from a captioner to an engine, whose captions are compared with PyTorch's before it is kept."""
