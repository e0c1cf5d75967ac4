"""How results are shown, whoever reads them: numbers, the tokens that matter, HTML for notebooks."""
