"""Many questions about pictures through a model: batches that fill the device, and results that outlive the run."""
