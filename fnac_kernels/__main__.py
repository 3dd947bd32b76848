from fnac_kernels._info import render

if __name__ == "__main__":
    print(render())
