"""Tasks by which any model is judged: a suite is a file, its questions are frozen, and every score is kept.

`suite` is the file; `questions` draws and freezes; `predictors` are the models and baselines; `runs` scores and caches;
`board` makes the leaderboard, `gate` accepts models, `contamination` refuses those that have seen the answers."""
