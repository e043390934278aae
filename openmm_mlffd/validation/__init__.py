"""Is a student fit for molecular dynamics? Measurements that return numbers and print nothing."""
