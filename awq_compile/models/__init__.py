"""What a model is: its configuration, its architecture's row of the table, its weights' names."""
