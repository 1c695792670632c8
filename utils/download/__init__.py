"""The downloader behind model_download.py, made for lines that break.

A listing (`source`, `listing`) pins one commit and says each file's size and hash. What is missing of a file is
fetched in ranges (`transfer`) into a .part file with a journal of what safely lies on the disk (`part`), so that a new
process goes on in mid-file. A file takes its name only when its hash is right (`proof`), and the manifest remembers it.
`failover` chooses among the sources, `http` sorts errors into those that pass and those that don't.
`dataset` has a data set's files fetched in the same way before a run reads them; `dataset_layout` says which they are.
"""
