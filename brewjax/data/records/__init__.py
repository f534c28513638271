"""What training reads: `pretrain`, `sft` and `preferences` make records from a dataset and its tasks, `shards` stores
them on disk with their `provenance`, and `mixture` and `loader` mix, shuffle, pack and batch them."""
