"""The paper's experiment on language models: new tasks with verifiable rewards, fine-tuned through TRL."""
