# syntax=docker/dockerfile:1
#
#   docker build --target cpu -t mull:cpu .        docker run -p 8000:8000 mull:cpu
#   docker build --target gpu -t mull:gpu .        docker run -p 8000:8000 --gpus all mull:gpu Qwen/Qwen3-8B

FROM python:3.11-slim-bookworm AS base
# vLLM's CPU kernels link libnuma; torch and Triton compile small kernels while serving.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/mull

# Dependencies come first, in a layer that only pyproject.toml and constraints.txt make stale; then Mull itself.
FROM base AS files
COPY LICENSE pyproject.toml constraints.txt ./
COPY scripts/install.sh scripts/
ENV PIP_NO_CACHE_DIR=1

FROM files AS cpu-build
RUN MULL_DEVICE=cpu scripts/install.sh none
COPY . .
RUN .venv/bin/pip install --quiet --no-deps --no-build-isolation .

FROM files AS gpu-build
RUN MULL_DEVICE=gpu scripts/install.sh none
COPY . .
RUN .venv/bin/pip install --quiet --no-deps --no-build-isolation .

FROM base AS runtime
RUN useradd --create-home --uid 1000 mull
ENV PATH=/opt/mull/.venv/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/mull
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["mull", "serve", "--host", "0.0.0.0"]

FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-build /opt/mull/.venv /opt/mull/.venv

# Last, and so the default target: it runs anywhere.
FROM runtime AS cpu
COPY --from=cpu-build /opt/mull/.venv /opt/mull/.venv
