"""Training a captioner: data, model, loss, and the output of a run."""
