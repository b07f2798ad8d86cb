//! `docker build` with the classic builder, whose steps are containers of the daemon's default runtime.

use std::fs;

use anyhow::{Result, ensure};
use husk_tests::{
    ctr::{self, Output},
    docker::Docker,
    host,
    runtime::Runtime,
};

use crate::context::Context;

/// A step that shows what kernel it has, one that has a file from outside, and one with what another stage has made.
const DOCKERFILE: &str = r#"
FROM busybox:husk AS made
RUN uname -r >/kernel
COPY --chown=1000 given /from/
RUN cp -p /from/given /out && echo more >>/out && chmod 640 /out
FROM busybox:husk
ARG CODE=0
COPY --from=made /kernel /out /
RUN ip -o -4 addr && exit $CODE
CMD ["sh", "-c", "cat /kernel /out; stat -c '%u %a' /out"]
"#;

fn build(docker: &Docker, arguments: &[&str]) -> Result<Output> {
    let mut command = docker.command(&[&["build"], arguments].concat());
    ctr::output(command.env("DOCKER_BUILDKIT", "0"))
}

pub fn classic(suite: &Context) -> Result<()> {
    let docker = suite.docker()?;
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("Dockerfile"), DOCKERFILE)?;
    fs::write(dir.path().join("given"), "from the host\n")?;
    let context = dir.path().display().to_string();
    let image = docker.fresh("built");
    build(docker, &["--tag", &image, &context])?.ok()?;
    let said = docker.ok(&["run", "--rm", &image])?;
    let (kernel, files) = said.split_once('\n').unwrap_or_default();
    let of_the_host = kernel == host::run(&["uname", "-r"])?.trim_end();
    ensure!(
        of_the_host == (suite.runtime != Runtime::Husk) && files == "from the host\nmore\n1000 640",
        "{said}"
    );
    // Only the last step is new, it has no network, and it fails.
    let arguments = [
        "--force-rm",
        "--network",
        "none",
        "--build-arg",
        "CODE=7",
        &context,
    ];
    let failed = build(docker, &arguments)?.exited(7)?;
    let text = failed.text();
    ensure!(
        failed.errors().contains("returned a non-zero code: 7")
            && text.matches("Using cache").count() == 5
            && text.contains("inet 127.0.0.1/8")
            && !text.contains("eth0"),
        "{failed:?}"
    );
    docker.ok(&["rmi", &image])?;
    Ok(())
}
