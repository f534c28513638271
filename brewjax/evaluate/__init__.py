"""How well a model ranks: predictions of the test questions, metrics with bootstrap intervals by slice, the baselines
that a model has to beat (popularity and LightGBM), and the report of a run as Markdown, HTML and terminal tables."""
