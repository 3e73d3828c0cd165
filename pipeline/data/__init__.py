"""Images and labels, described once and read in one way; the demo scenes; crops and batches for training."""
