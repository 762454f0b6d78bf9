# The captioning server on NVIDIA GPUs, with the packages of requirements/gpu.lock. With SM, the slim variant: the device
# code of one compute capability alone (90: H100, H200; 89: L4, L40S; 80: A100), and nothing for video, other models, flashinfer.
#
#   docker build -f deploy/docker/gpu.Dockerfile -t vlv:gpu .
#   docker build -f deploy/docker/gpu.Dockerfile --build-arg SM=90 -t vlv:gpu-sm90 .
#   docker run --gpus all --read-only --tmpfs /tmp --shm-size 8g -v vlv-cache:/cache -v /models/vlv:/models/vlv:ro \
#     -v "$PWD/keys.json:/etc/vlv/keys.json:ro" -p 8000:8000 \
#     vlv:gpu serve.server --ckpt /models/vlv --host 0.0.0.0 --keys /etc/vlv/keys.json
ARG PYTHON=python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7

FROM ${PYTHON} AS build
ARG SM=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/vlv/bin:$PATH
RUN python -m venv /opt/vlv
WORKDIR /src
COPY requirements/gpu.lock requirements/gpu.lock
RUN pip install -r requirements/gpu.lock
COPY deploy/docker/slim_cuda.py deploy/docker/slim.txt deploy/docker/
RUN if [ -n "${SM}" ]; then pip uninstall -y -r deploy/docker/slim.txt \
    && python deploy/docker/slim_cuda.py --sm "${SM}" /opt/vlv; fi
COPY . .
RUN pip install --no-deps --no-build-isolation . \
    && python -m serve.server --help >/dev/null \
    && python deploy/docker/sbom.py >/opt/vlv/sbom.cdx.json

FROM ${PYTHON}
# Triton and FlashInfer compile when they run
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && mkdir /cache && chown 10001:10001 /cache
COPY --from=build /opt/vlv /opt/vlv
ENV PATH=/opt/vlv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=vlv XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/hf VLLM_CACHE_ROOT=/cache/vllm TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /tmp
VOLUME /cache
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["python", "-m"]
CMD ["serve.server", "--help"]
