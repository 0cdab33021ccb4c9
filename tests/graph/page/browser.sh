#!/usr/bin/env bash
# Make sure that there is a Chromium, and put axe-core into PLACE: browser.sh PLACE
set -eu
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    root=; [ "$(id -u)" = 0 ] || root=sudo
    $root apt-get update -qq
    $root apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
fi
npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$1" axe-core@4.14.1
