if __name__ == "pallas_kernels":
    raise ImportError("import effattn.pallas_kernels: the bare name would load every module twice")
