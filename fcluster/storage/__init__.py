"""Where state lasts: RocksDB, snapshots and their stores, restores, warm copies."""
