#!/usr/bin/env bash
# Starts a Docker engine for the tests on a bare Debian machine, as root, unless one answers already.
#
#   bash scripts/docker_engine.sh          start it; it stays until the machine or `stop` ends it
#   bash scripts/docker_engine.sh stop     end the one that this script started
#
# The engine listens on its unix socket alone and has no bridge and no address translation, which need rights that
# test machines lack: containers use `network: host` or `none`. Missing packages are installed by apt: the engine, and
# busybox-static for scripts/base_image.py.
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
    [ -f "$pid_file" ] || die "none was started by this script"
    local pid
    pid=$(cat "$pid_file")
    rm -f "$pid_file"
    # The number may belong to another process by now.
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
        [ "$(id -u)" = 0 ] || die "none answers, and only root can start one"
        install_missing
        # docker.io's own start script may have started one just now.
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
    *) die "start or stop?" ;;
esac
