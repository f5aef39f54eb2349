from benchmarks.scaling.report import main

main()
