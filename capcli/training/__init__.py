"""Training a captioner: data, model, loss, and what a run leaves."""
