"""Where state is kept: RocksDB, snapshots and their stores, restores, warm copies."""
