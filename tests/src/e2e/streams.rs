//! Streams through CRI as `kubectl exec`, `attach` and `port-forward` have them.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    thread,
};

use anyhow::{Result, anyhow, ensure};
use husk_tests::{
    cri::{Cri, Pod, PodContainer, container, v1},
    host,
    streams::Kind,
    wait,
};
use nix::sched::{CloneFlags, setns};

use crate::{
    Test,
    context::{Context, sha256},
    husk_test, test,
};

pub const TESTS: &[Test] = &[
    test("exec", exec),
    test("attach", attach),
    test("port_forward", port_forward),
    husk_test("port_forward_without_a_pause_container", sandboxer),
];

/// It counts what the host holds.
pub const ALONE: &[Test] = &[test("a_pod_goes_while_a_port_is_forwarded", removal)];

const SLEEP: [&str; 2] = ["sleep", "1000000"];

const MIB: usize = 1 << 20;

/// Bytes in which a lost or doubled piece shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

fn exec(suite: &Context) -> Result<()> {
    let pod = suite.cri()?.pod()?;
    let main = pod.start(container(&SLEEP))?;

    let session = main.exec_session(Kind::Pipes, &["sh", "-c", "cat; echo apart >&2; exit 3"])?;
    session.stdin.send(b"through")?;
    session.stdin.finish()?;
    let ended = session.ended()?;
    ensure!(
        (ended.code, &*ended.out, &*ended.err) == (3, "through", "apart"),
        "{ended:?}"
    );

    let sent = pattern(4 * MIB);
    let session = main.exec_session(Kind::Pipes, &["cat"])?;
    session.stdin.send(&sent)?;
    session.stdin.finish()?;
    let came = session.stdout.rest()?;
    ensure!(
        sha256(&came) == sha256(&sent),
        "{} of {} bytes came back, or others",
        came.len(),
        sent.len()
    );
    ensure!(session.ended()?.code == 0);

    let script = "tty; read line; echo \"typed $line\"; until [ \"$(stty size)\" = '40 100' ]; do sleep 0.1; done; exit 7";
    let session = main.exec_session(Kind::Terminal, &["sh", "-c", script])?;
    let screen = session.stdout.receive_until("\n")?;
    ensure!(screen.starts_with("/dev/pts/"), "{screen:?}");
    session.stdin.send(b"words\r")?;
    session.stdout.receive_until("typed words\r\n")?;
    session.resize(100, 40)?;
    ensure!(session.ended()?.code == 7);

    // Who asked for it has gone: it does not stay.
    let session = main.exec_session(Kind::Pipes, &["cat"])?;
    session.stdin.send(b"here")?;
    session.stdout.receive_until("here")?;
    ensure!(main.exec(&["pidof", "cat"])?.code == 0);
    drop(session);
    wait::until("the end of a process whose client has gone", || {
        (main.exec(&["pidof", "cat"]).ok()?.code != 0).then_some(())
    })
}

fn attach(suite: &Context) -> Result<()> {
    let pod = suite.cri()?.pod()?;
    // The ticks tell that an attach sees the output.
    let script = "(while :; do echo tick; sleep 1; done) & \
        while read line; do echo \"got $line\"; echo \"noted $line\" >&2; [ \"$line\" != last ] || break; done; \
        kill $!; exit 5";
    let mut config = container(&["sh", "-c", script]);
    config.stdin = true;
    let main = pod.start(config)?;
    let attach = || -> Result<_> {
        let session = main.attach(Kind::Pipes)?;
        session.stdout.receive_until("tick")?;
        Ok(session)
    };
    let (one, other) = (attach()?, attach()?);
    one.stdin.send(b"first\n")?;
    one.stdout.receive_until("got first\n")?;
    other.stdout.receive_until("got first\n")?;

    drop(one);
    other.stdin.send(b"second\n")?;
    other.stdout.receive_until("got second\n")?;
    drop(other);
    let state = main.status()?.state();
    ensure!(state == v1::ContainerState::ContainerRunning, "{state:?}");

    let last = attach()?;
    last.stdin.send(b"last\n")?;
    last.stdout.receive_until("got last\n")?;
    // An attach tells that it is over, not how the container has ended.
    let seen = last.ended()?;
    ensure!(
        seen.code == 0 && seen.err.ends_with("noted last"),
        "{seen:?}"
    );
    ensure!(main.ended()?.code == 5);
    Ok(())
}

/// Servers on ports of their own: a page (localhost only, by IPv4 and by IPv6), and one that sends back what comes.
const PAGE: u16 = 8080;
const PAGE_BY_IPV6: u16 = 8086;
const ECHO: u16 = 7000;
const NOBODY: u16 = 9;
const LOCALHOST: &str = "127.0.0.1";

fn servers<'a>(pod: &'a Pod<'_>) -> Result<PodContainer<'a>> {
    let script = format!(
        "mkdir /www; echo the page >/www/index.html; \
         httpd -p 127.0.0.1:{PAGE} -h /www; httpd -p '[::1]:{PAGE_BY_IPV6}' -h /www; \
         exec nc -ll -p {ECHO} -e cat"
    );
    let main = pod.start(container(&["sh", "-c", &script]))?;
    wait::until("the servers to listen", || {
        let listening = main.sh("netstat -ltn").ok()?.out;
        let all = [PAGE, PAGE_BY_IPV6, ECHO];
        all.iter()
            .all(|port| listening.contains(&format!(":{port} ")))
            .then_some(())
    })?;
    Ok(main)
}

fn port_forward(suite: &Context) -> Result<()> {
    let pod = suite.cri()?.pod()?;
    let _main = servers(&pod)?;
    let mut client = pod.port_forward()?;
    for port in [PAGE, PAGE, PAGE_BY_IPV6] {
        let connection = client.dial(port)?;
        connection.data.send(b"GET / HTTP/1.0\r\n\r\n")?;
        let (answer, error) = connection.ended()?;
        let answer = String::from_utf8_lossy(&answer);
        ensure!(
            answer.starts_with("HTTP/1.") && answer.ends_with("the page\n") && error.is_empty(),
            "{port}: {answer:?} {error:?}"
        );
    }

    let many: Vec<_> = (0..8).map(|_| client.dial(ECHO)).collect::<Result<_>>()?;
    for round in 0..2 {
        for (number, connection) in many.iter().enumerate() {
            connection
                .data
                .send(format!("{number} {round}\n").as_bytes())?;
        }
        for (number, connection) in many.iter().enumerate() {
            connection
                .data
                .receive_until(&format!("{number} {round}\n"))?;
        }
    }
    for connection in many {
        connection.data.finish()?;
        let (more, error) = connection.ended()?;
        ensure!(more.is_empty() && error.is_empty(), "{more:?} {error:?}");
    }

    let sent = pattern(10 * MIB);
    let connection = client.dial(ECHO)?;
    connection.data.send(&sent)?;
    let came = connection.data.receive_bytes(sent.len())?;
    ensure!(
        sha256(&came) == sha256(&sent),
        "{} bytes, or others",
        came.len()
    );
    connection.data.finish()?;
    let (more, error) = connection.ended()?;
    ensure!(more.is_empty() && error.is_empty(), "{more:?} {error:?}");

    // containerd 1.7 says nothing of a connection that was accepted and then reset.
    let (data, _) = client.dial(NOBODY)?.ended()?;
    ensure!(data.is_empty(), "{data:?}");
    echo(&pod)?;
    // It ends both directions a second after the first as well, so the rest is asked where it dials.
    inside(&pod, half_close)?;
    inside(&pod, refused)
}

/// Does something in the pod's network namespace on the host.
fn inside(pod: &Pod<'_>, what: fn() -> Result<()>) -> Result<()> {
    let netns = File::open(pod.netns()?)?;
    let visit = thread::spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        what()
    });
    visit.join().map_err(|_| anyhow!("the visit has failed"))?
}

/// Who ends what it sends still gets all of the answer.
fn half_close() -> Result<()> {
    let sent = pattern(MIB);
    let mut client = TcpStream::connect((LOCALHOST, ECHO))?;
    client.set_read_timeout(Some(wait::HANG))?;
    let (mut writer, copy) = (client.try_clone()?, sent.clone());
    let writer = thread::spawn(move || {
        writer.write_all(&copy)?;
        writer.shutdown(Shutdown::Write)
    });
    let mut came = Vec::new();
    client.read_to_end(&mut came)?;
    ensure!(came == sent, "{} bytes, or others", came.len());
    let written = writer.join();
    Ok(written.map_err(|_| anyhow!("the writer has failed"))??)
}

/// Nobody listens: at once or right after, the connection is refused.
fn refused() -> Result<()> {
    let answer = TcpStream::connect((LOCALHOST, NOBODY)).and_then(|mut client| {
        client.set_read_timeout(Some(wait::HANG))?;
        client.read(&mut [0])
    });
    let kind = answer.as_ref().map_err(io::Error::kind);
    let is_refused = [ErrorKind::ConnectionRefused, ErrorKind::ConnectionReset];
    ensure!(
        kind.is_err_and(|kind| is_refused.contains(&kind)),
        "{answer:?}"
    );
    Ok(())
}

fn echo(pod: &Pod<'_>) -> Result<()> {
    let mut client = pod.port_forward()?;
    let connection = client.dial(ECHO)?;
    connection.data.send(b"hello\n")?;
    connection.data.receive_until("hello\n")?;
    connection.data.finish()?;
    let (more, error) = connection.ended()?;
    ensure!(more.is_empty() && error.is_empty(), "{more:?} {error:?}");
    Ok(())
}

fn sandboxer(suite: &Context) -> Result<()> {
    let (_, cri) = suite.sandboxer()?;
    let pod = cri.pod()?;
    let _main = servers(&pod)?;
    echo(&pod)
}

fn removal(suite: &Context) -> Result<()> {
    let cri: &Cri = suite.cri()?;
    // The bridge is there from the first pod on.
    drop(cri.pod()?);
    let namespaces = || -> Result<Vec<_>> {
        let mut all: Vec<_> = fs::read_dir("/run/netns")?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<Result<_>>()?;
        all.sort();
        Ok(all)
    };
    let (before, namespaces_before) = (host::Traces::now(), namespaces()?);
    let pod = cri.pod()?;
    let _main = servers(&pod)?;
    let mut client = pod.port_forward()?;
    let connection = client.dial(ECHO)?;
    connection.data.send(b"hello\n")?;
    connection.data.receive_until("hello\n")?;
    pod.stop()?;
    connection.ended()?;
    drop(pod);
    ensure!(namespaces()? == namespaces_before);
    before.restored()
}
