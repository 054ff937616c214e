"""Downloads of checkpoints: demo models and the Hugging Face Hub."""
