//! `husk create`, `start`, `run` and `attach`.

use std::{
    env,
    io::{self, BufRead as _, BufReader, IsTerminal as _, Read as _, Write as _},
    process::{Child, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use chrono::{SecondsFormat, Utc};
use husk_image::{
    layer::Limits,
    manifest::Platform,
    name::ImageName,
    store::{Image, Store},
};
use oci_spec::image::Config;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::{
    args::{self, PullPolicy},
    attach::{Outcome, Wanted, attach, connect},
    command::Code,
    container::{Container, Record, State},
    files,
    monitor::{self, Report},
    names,
    network::{NONE, Networks, Port},
    place::{Place, find},
    pull, spec, terminal,
};

pub(crate) fn create(place: &Place, args: &args::Create) -> Result<()> {
    let container = make(place, args, false)?;
    writeln!(io::stdout(), "{}", container.record.id)?;
    Ok(())
}

pub(crate) fn run(place: &Place, args: &args::Run) -> Result<()> {
    let create = &args.create;
    if !args.detach {
        terminal::check(create.tty, create.interactive).map_err(Code::own)?;
    }
    // What fails before the container runs is husk's: 125, as docker has it.
    let container = make(place, create, !args.detach).map_err(Code::own)?;
    if args.detach {
        start_one(place, &container)?;
        writeln!(io::stdout(), "{}", container.record.id)?;
        return Ok(());
    }
    let wanted = Wanted {
        stdin: create.interactive,
        terminal: create.tty,
        signals: true,
    };
    let outcome = start_attached(place, &container, wanted);
    end(place, &container, outcome?)
}

pub(crate) fn start(place: &Place, args: &args::Start) -> Result<()> {
    place.for_containers()?;
    let containers = place.containers()?;
    if args.attach || args.interactive {
        let [word] = args.containers.as_slice() else {
            bail!("one can attach to one container only");
        };
        let container = containers.find(word)?;
        let record = &container.record;
        let wanted = Wanted {
            stdin: args.interactive && record.stdin,
            terminal: record.terminal,
            signals: true,
        };
        let outcome = start_attached(place, &container, wanted)?;
        return end(place, &container, outcome);
    }
    let mut failed = false;
    for word in &args.containers {
        let started = containers
            .find(word)
            .and_then(|container| start_one(place, &container));
        match started {
            Ok(()) => writeln!(io::stdout(), "{word}")?,
            Err(error) => {
                eprintln!("husk: {error:#}");
                failed = true;
            }
        }
    }
    if failed {
        bail!("not every container was started");
    }
    Ok(())
}

pub(crate) fn attach_to(place: &Place, args: &args::Attach) -> Result<()> {
    let container = place.containers()?.find(&args.container)?;
    if container.status()?.state != State::Running {
        bail!(
            "container {} does not run: `husk start -a` starts it",
            container.record.name
        );
    }
    let record = &container.record;
    let wanted = Wanted {
        stdin: record.stdin && !args.no_stdin,
        terminal: record.terminal,
        signals: true,
    };
    let outcome = on_threads(async { attach(connect(&container).await?, wanted).await })?;
    end(place, &container, outcome)
}

/// The caller ends as the container has.
fn end(place: &Place, container: &Container, outcome: Outcome) -> Result<()> {
    let code = match outcome {
        Outcome::Detached => return Ok(()),
        Outcome::Exited(code) => {
            // Whoever comes next finds it ended, or gone.
            container.wait_for_monitor()?;
            code
        }
        Outcome::Lost => {
            container.wait_for_monitor()?;
            // With it went the container, or its end was not told in time.
            let again = place.containers()?.find(&container.record.id);
            again
                .and_then(|c| c.status())
                .ok()
                .and_then(|status| status.exit_code)
                .unwrap_or(125)
        }
    };
    match u8::try_from(code).unwrap_or(255) {
        0 => Ok(()),
        code => Err(Code::silent(code)),
    }
}

/// Runs what is asynchronous. What it leaves behind, as the thread that reads standard input, ends with the process.
pub(crate) fn on_threads<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting threads")?;
    let done = runtime.block_on(future);
    runtime.shutdown_background();
    done
}

/// A monitor that has been started.
struct Started {
    monitor: Child,
    reports: BufReader<ChildStdout>,
}

impl Started {
    fn new(place: &Place, container: &Container, attached: bool) -> Result<Self> {
        let log = monitor::own_log(container)?;
        let mut command = Command::new(env::current_exe().context("finding husk's own program")?);
        command.arg("--root").arg(place.root()).arg("monitor");
        if attached {
            command.arg("--attached");
        }
        command
            .arg(&container.record.id)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        let mut monitor = command
            .spawn()
            .context("starting the container's monitor")?;
        let stdout = monitor.stdout.take().context("the monitor has no output")?;
        Ok(Self {
            monitor,
            reports: BufReader::new(stdout),
        })
    }

    fn next(&mut self) -> Result<Report> {
        let mut line = String::new();
        // A report has one line, and a monitor is one of us.
        self.reports.by_ref().take(1 << 20).read_line(&mut line)?;
        if line.is_empty() {
            let status = self.monitor.wait()?;
            bail!(
                "the container's monitor has ended without a word ({status}): monitor.log in its directory may say why"
            );
        }
        serde_json::from_str(&line).context("reading what the container's monitor says")
    }

    /// The container runs, or it does not.
    fn started(&mut self) -> Result<()> {
        match self.next()? {
            Report::Started => Ok(()),
            Report::Listening => bail!("the container's monitor says twice that it listens"),
            Report::Failed { error, code } => Err(Code::with(code, anyhow::anyhow!("{error}"))),
        }
    }
}

/// One that runs already is as it should be.
fn start_one(place: &Place, container: &Container) -> Result<()> {
    if container.status()?.state == State::Running {
        return Ok(());
    }
    Started::new(place, container, false)?.started()
}

fn start_attached(place: &Place, container: &Container, wanted: Wanted) -> Result<Outcome> {
    let mut started = Started::new(place, container, true)?;
    match started.next()? {
        Report::Listening => {}
        Report::Failed { error, code } => return Err(Code::with(code, anyhow::anyhow!("{error}"))),
        Report::Started => bail!("the container's monitor did not wait"),
    }
    on_threads(async {
        let stream = connect(container).await?;
        let attached = attach(stream, wanted);
        let reported = tokio::task::spawn_blocking(move || started.started());
        tokio::pin!(attached, reported);
        tokio::select! {
            biased;
            report = &mut reported => {
                report.context("waiting for the container's monitor")??;
                attached.await
            }
            outcome = &mut attached => match outcome? {
                // The monitor goes when the container does not start, and says why.
                Outcome::Lost => {
                    reported.await.context("waiting for the container's monitor")??;
                    Ok(Outcome::Lost)
                }
                outcome => Ok(outcome),
            },
        }
    })
}

/// Makes a container as the command line says.
fn make(place: &Place, args: &args::Create, attached: bool) -> Result<Container> {
    place.for_containers()?;
    let store = place.store()?;
    let holder = store.begin()?;
    let image = image(place, &store, args)?;
    let config = image.config.config().clone().unwrap_or_default();
    let layers = store.unpack(&image.layers, Limits::default())?;
    let id = random_hex()?;
    let mut args = args.clone();
    args.hostname
        .get_or_insert_with(|| id.chars().take(12).collect());
    let user = args
        .user
        .clone()
        .or_else(|| config.user().clone())
        .unwrap_or_default();
    let identity = files::identity(&layers, &user)?;
    let command = spec::command(&args, &config)?;
    let env = spec::environment(&args, &config, &identity, |name| env::var(name).ok())?;
    let volumes = place.private("volumes")?;
    let mounts = args
        .volume
        .iter()
        .map(|word| files::volume(&volumes, word))
        .collect::<Result<_>>()?;
    let spec = spec::build(&spec::Parts {
        id: &id,
        args: &args,
        config: &config,
        command: &command,
        identity: &identity,
        env: &env,
        mounts,
    })?;
    let chain = layers
        .iter()
        .filter_map(|dir| Some(dir.file_name()?.to_str()?.to_owned()))
        .collect();
    let record = Record {
        name: match &args.name {
            Some(name) => names::checked(name)?,
            None => names::made_up(&id),
        },
        image: args.image.clone(),
        image_id: image.digest.to_string(),
        chain,
        layers,
        created: Utc::now().to_rfc3339_opts(SecondsFormat::Nanos, true),
        command,
        terminal: args.tty,
        stdin: args.interactive,
        stdin_once: args.interactive && attached,
        remove: args.remove,
        stop_signal: stop_signal(&args, &config),
        network: network(place, &args)?,
        ports: ports(&args)?,
        spec,
        id,
    };
    let container = place.containers()?.create(record)?;
    // From here on the container keeps the layers.
    drop(holder);
    Ok(container)
}

fn network(place: &Place, args: &args::Create) -> Result<String> {
    match &*args.network {
        "host" => bail!(
            "--network host: a container has a VM of its own, and nothing of the host's network; -p publishes a port"
        ),
        NONE => {}
        name => drop(Networks::new(place.root()).find(name)?),
    }
    Ok(args.network.clone())
}

fn ports(args: &args::Create) -> Result<Vec<Port>> {
    if args.network == NONE && !args.publish.is_empty() {
        bail!("-p wants a network, and --network none is given");
    }
    args.publish.iter().map(|word| word.parse()).collect()
}

fn stop_signal(args: &args::Create, config: &Config) -> String {
    let own = args
        .stop_signal
        .clone()
        .or_else(|| config.stop_signal().clone());
    own.unwrap_or_else(|| "SIGTERM".to_owned())
}

/// The image, pulled if that is wanted.
fn image(place: &Place, store: &Store, args: &args::Create) -> Result<Image> {
    let here = Platform::here();
    let word = &args.image;
    if args.pull != PullPolicy::Always
        && let Some(image) = find_image(store, word, &here)?
    {
        return Ok(image);
    }
    if args.pull != PullPolicy::Never {
        let name: ImageName = word.parse()?;
        if args.pull == PullPolicy::Missing && !args.quiet && io::stderr().is_terminal() {
            eprintln!("husk: there is no image {name} here, pulling it");
        }
        pull::pull_for_run(place, &name, args.quiet)?;
        if let Some(image) = find_image(store, word, &here)? {
            return Ok(image);
        }
    }
    bail!("there is no image {word:?}: `husk pull {word}` pulls it");
}

/// The image that a user means, in the words of [`find`].
fn find_image(store: &Store, word: &str, here: &Platform) -> Result<Option<Image>> {
    let whole = word.parse::<ImageName>().map(|name| name.to_string());
    for name in [Ok(word.to_owned()), whole].into_iter().flatten() {
        if let Some(image) = store.image(&name, here)? {
            return Ok(Some(image));
        }
    }
    // Only an id has all images looked at.
    let images = store.list(here)?;
    let found = find(&images, word).ok();
    let Some(listed) = found.and_then(|found| found.first().copied()) else {
        return Ok(None);
    };
    match &listed.image {
        Some(image) => Ok(Some(image.clone())),
        // Its own words.
        None => Ok(store.image(&listed.name, here)?),
    }
}

/// 32 bytes of nobody else's, as 64 hex digits.
fn random_hex() -> Result<String> {
    let mut bytes = [0; 32];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += getrandom(rest, GetRandomFlags::empty()).context("making up an id")?;
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
