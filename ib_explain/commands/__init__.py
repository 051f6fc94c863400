"""The commands of `ib-explain`, a file each: `run(args)` checks, calls the library, writes, says what it wrote."""
