if __name__ == "models":
    raise ImportError("import effattn.models: the bare name would load every module twice")
