from hessian_overlap.experiment import main

if __name__ == "__main__": raise SystemExit(main())
