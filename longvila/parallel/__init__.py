"""How ranks share a row: folds, layouts, plans, attention over ranks. The only home of collectives; knows no model."""
