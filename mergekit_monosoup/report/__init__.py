"""Edit records and what is made of them: JSONL files, tables, figures, the model card's section."""
