# Fleet, engines, and `pawl serve`. Everything goes into the image's own Python: KubeRay starts Ray from a shell
# whose PATH knows nothing of a virtual environment.
#   docker build -f deploy/docker/worker.Dockerfile -t pawl-worker:0.1.0 .
# Without a GPU, torch comes smaller:
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY client ./client
COPY server ./server
COPY workers ./workers
COPY loadtest ./loadtest
# The C kernels go into the wheel: the image that runs has no compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && python workers/pawl_workers/kernels/native/build.py --into-package
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11.13-slim-bookworm
ARG TORCH_INDEX=https://pypi.org/simple
COPY constraints.txt /tmp/constraints.txt
# torch first and by itself, so that its layer outlives changes of pawl.
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt \
    --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /tmp/constraints.txt "$(echo /wheels/pawl_serve-*.whl)[workers]" \
    && rm /tmp/constraints.txt \
    && useradd --uid 10001 --user-group --create-home pawl
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
USER 10001:10001
EXPOSE 50051 9400
ENTRYPOINT ["pawl"]
CMD ["serve", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0"]
