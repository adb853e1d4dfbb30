if __name__ == "configs":
    raise ImportError("import effattn.configs: the bare name would load every module twice")
