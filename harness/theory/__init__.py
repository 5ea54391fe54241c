"""What a model on a machine can do at best: pure arithmetic from a configuration and a data row."""
