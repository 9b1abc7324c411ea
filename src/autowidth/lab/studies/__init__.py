"""Studies: measurements that answer one question each; what a decision rests on. One file each, run as a module."""
