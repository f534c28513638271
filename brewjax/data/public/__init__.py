"""Public datasets as dataset folders: one reader for each source, from a package or a local copy.

Nothing of the data is part of brewjax; each licence is printed when a dataset is fetched."""
