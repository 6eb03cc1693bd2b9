#!/usr/bin/env bash
# Builds the site of docs/ into build/docs. A warning is an error: a link or an anchor that leads nowhere, a page that no
# page leads to, a docstring that cannot be read. Arguments go to sphinx-build: -b linkcheck asks other sites, too.
source "$(dirname "$0")/setup.sh" docs
"$python" -m sphinx --fail-on-warning --keep-going --quiet --jobs 1 "$@" docs build/docs
echo "build/docs/index.html"
