# carft-ray on one machine, in a container. A cluster needs cluster/Dockerfile.
#
#     docker build -t carft-ray .                                     torch with CUDA, as the package index has it
#     docker build -t carft-ray --build-arg TORCH_INDEX=ADDRESS .     another torch build: a small one for CPUs, say
#     docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" carft-ray search recipe.yaml --study studies/first
#
# Files are written as user 1000; --build-arg USER_ID="$(id -u)" takes your own number. Weights and decoded images are in
# /cache: -v carft-cache:/cache keeps them for the next container.

ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS base
ARG USER_ID=1000
RUN useradd --create-home --uid "${USER_ID}" carft && install -d -o carft /work /cache
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface

# for developers (.devcontainer): what `make test` uses besides Python
FROM base AS dev
RUN apt-get update \
    && apt-get install --yes --no-install-recommends chromium g++ git make \
    && rm -rf /var/lib/apt/lists/*
USER carft

FROM base
ARG TORCH_INDEX=
WORKDIR /opt/carft-ray
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY carft_ray ./carft_ray
COPY search_spaces ./search_spaces
RUN pip install --no-cache-dir torch torchvision ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} \
    && pip install --no-cache-dir ".[bucket,hf,onnx]"
USER carft
RUN carft-ray validate search_spaces/quickstart.yaml
WORKDIR /work
ENTRYPOINT ["carft-ray"]
