#!/usr/bin/env bash
# Starts a Docker engine for the tests on a bare Debian machine, as root, unless one is already running.
#
#   bash scripts/docker_engine.sh          start it; it runs until `stop` or shutdown
#   bash scripts/docker_engine.sh stop     stop the engine that this script started
#
# The engine listens on its unix socket only. It has no bridge and no NAT, which need privileges that test machines lack:
# containers use `network: host` or `none`. Missing packages are installed with apt: the engine, and busybox-static for
# scripts/base_image.py.
set -euo pipefail

pid_file=/var/run/mlorq-dockerd.pid
log=${TMPDIR:-/tmp}/mlorq-dockerd.log
packages=(docker.io iptables busybox-static)

say() { printf 'docker engine: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

answers() { docker info >/dev/null 2>&1; }

stop() {
    [ -f "$pid_file" ] || die "this script has not started one"
    local pid
    pid=$(cat "$pid_file")
    rm -f "$pid_file"
    # The PID may have been reused.
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ]; then kill "$pid"; fi
}

install_missing() {
    if command -v dockerd >/dev/null && command -v iptables >/dev/null && command -v busybox >/dev/null; then return; fi
    command -v apt-get >/dev/null || die "no dockerd here, and no apt-get to install it with"
    say "installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}

start() {
    if ! command -v docker >/dev/null || ! answers; then
        [ "$(id -u)" = 0 ] || die "no engine answers, and only root can start one"
        install_missing
        # Installing docker.io may have started one.
        if ! answers; then
            setsid dockerd --host unix:///var/run/docker.sock --bridge=none --iptables=false --ip-forward=false \
                >"$log" 2>&1 </dev/null &
            local pid=$!
            for _ in $(seq 120); do
                answers && break
                kill -0 "$pid" 2>/dev/null || die "it ended at once: $(tail -n 3 "$log")"
                sleep 0.5
            done
            answers || die "it does not answer after a minute; its log is $log"
            echo "$pid" >"$pid_file"
        fi
    fi
    docker info -f '{{.ServerVersion}}, driver {{.Driver}}, cgroups v{{.CgroupVersion}}'
}

case ${1:-start} in
    start) start ;;
    stop) stop ;;
    *) die "unknown command $1: use start or stop" ;;
esac
