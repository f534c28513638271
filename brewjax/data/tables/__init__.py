"""What a company has: the tables of members, items and events, read from Parquet and checked against their card.

`card` declares how the tables are described, `reading` and `validate` read and check them, `dataset` holds them,
`point_in_time` and `statistics` compute numbers as of a time.
"""
