"""What tests share: problems and yardsticks, runs to compare, ranks and backends to run on."""
