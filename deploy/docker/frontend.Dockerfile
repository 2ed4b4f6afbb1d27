# The process that faces the network: without torch and without Ray.
#   docker build -f deploy/docker/frontend.Dockerfile -t pawl-frontend:0.1.0 .
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY client ./client
COPY server ./server
COPY workers ./workers
COPY loadtest ./loadtest
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11.13-slim-bookworm
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /tmp/constraints.txt "$(echo /wheels/pawl_serve-*.whl)[server]" \
    && rm /tmp/constraints.txt \
    && useradd --uid 10001 --user-group --create-home pawl
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
USER 10001:10001
# 50052 (admin) stays on loopback.
EXPOSE 50051 9400
ENTRYPOINT ["pawl"]
CMD ["frontend", "--fleet", "127.0.0.1:50060", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0"]
