//! Starting the process that makes the calls, in a cgroup of its own.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::Duration,
};

use tokio::{process::Command, sync::Mutex, time::timeout};

use super::calls::Report;

/// Longer than all calls together may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// The same for a call from an excluded cgroup, which may be frozen: others wait to be excluded meanwhile.
const EXEMPT_PATIENCE: Duration = Duration::from_secs(5);
/// Name of the cgroup, below the one that is served. Always the same: what an agent that was killed left is used and removed
/// by the next.
const NAME: &str = "socklb-self-test";

/// From where the calls came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// From a cgroup that was made for them.
    FreshCgroup,
    /// From the agent's own cgroup, since none could be made or entered, for this reason. The calls prove then that this
    /// cgroup is served, and no other.
    OwnCgroup(String),
}

/// What came of a self-test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// From where the calls came.
    pub caller: Caller,
    /// What went wrong; nothing, if the test is passed.
    pub problems: Vec<String>,
}

/// What came of a call from an excluded cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exempt {
    /// It was left alone.
    LeftAlone,
    /// It was not, or went wrong in another way.
    Failed(String),
    /// There was none, for this reason.
    NotMade(String),
}

/// Makes the calls once, below the cgroup that is served.
///
/// A problem of the test itself counts as one: what is not proven is not promised.
pub async fn run(served: &Path, has_ipv6: bool) -> Outcome {
    let _turn = TURN.lock().await;
    let fresh = Fresh::make(served);
    let cgroup = fresh.as_ref().ok().map(|fresh| fresh.0.as_path());
    let report = ask(cgroup, has_ipv6.then_some("--ipv6"), PATIENCE)
        .await
        .unwrap_or_else(|problem| Report { stayed: None, problems: vec![problem] });
    let caller = match (&fresh, report.stayed) {
        (Err(error), _) => Caller::OwnCgroup(error.clone()),
        (Ok(_), Some(why)) => Caller::OwnCgroup(why),
        (Ok(_), None) => Caller::FreshCgroup,
    };
    Outcome { caller, problems: report.problems }
}

/// Makes a call from a fresh cgroup below an excluded one.
///
/// It means something only while calls from elsewhere are seen to work.
pub async fn run_below_excluded(excluded: &Path) -> Exempt {
    match Fresh::make(excluded) {
        Ok(fresh) => exempt(Some(&fresh.0)).await,
        Err(error) => Exempt::NotMade(error),
    }
}

/// Makes a call from this process's own cgroup, which is excluded for as long as `exclude`'s answer lives. No self-test runs
/// meanwhile.
pub async fn run_excluded<E>(exclude: impl FnOnce() -> Result<E, String>) -> Exempt {
    let _turn = TURN.lock().await;
    match exclude() {
        Ok(_excluded) => exempt(None).await,
        Err(problem) => Exempt::NotMade(problem),
    }
}

/// One of those that depend on whether the own cgroup is excluded.
static TURN: Mutex<()> = Mutex::const_new(());

async fn exempt(cgroup: Option<&Path>) -> Exempt {
    match ask(cgroup, Some("--excluded"), EXEMPT_PATIENCE).await {
        Ok(Report { stayed: Some(why), .. }) | Err(why) => Exempt::NotMade(why),
        Ok(Report { problems, .. }) if problems.is_empty() => Exempt::LeftAlone,
        Ok(Report { problems, .. }) => Exempt::Failed(problems.join("; ")),
    }
}

/// Has a process make calls from a cgroup, or from this process's own. Returns what the process says, or why it says nothing.
async fn ask(cgroup: Option<&Path>, flag: Option<&str>, patience: Duration) -> Result<Report, String> {
    // The running program, also if its file was replaced or is out of sight.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("socklb")
        .arg("self-test-calls")
        .args(flag)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if let Some(cgroup) = cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    let failed = |problem: String| format!("the process that makes the calls: {problem}");
    let output = match timeout(patience, command.output()).await {
        Ok(output) => output.map_err(|error| failed(error.to_string()))?,
        Err(_elapsed) => return Err(format!("the calls did not end within {} s", patience.as_secs())),
    };
    serde_json::from_slice(&output.stdout).map_err(|_no_report| {
        let said = String::from_utf8_lossy(&output.stderr);
        failed(format!("{}: {}", output.status, said.lines().last().unwrap_or("it said nothing")))
    })
}

/// A cgroup that is removed with this value, once it is empty.
#[derive(Debug)]
struct Fresh(PathBuf);

/// Removes what a self-test left below this cgroup because its agent was killed, and says where it was.
#[must_use]
pub fn remove_leftover(served: &Path) -> Option<PathBuf> {
    let cgroup = served.join(NAME);
    // One that cannot be removed is in use: its self-test removes it.
    fs::remove_dir(&cgroup).is_ok().then_some(cgroup)
}

impl Fresh {
    /// Makes it, or says what could not be made or written.
    fn make(parent: &Path) -> Result<Self, String> {
        let error = |path: &Path, error: &io::Error| format!("{}: {error}", path.display());
        let cgroup = Self(parent.join(NAME));
        match fs::create_dir(&cgroup.0) {
            Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error(&cgroup.0, &cause));
            }
            _ => {}
        }
        // Below a threaded cgroup one is of no use until it is threaded as well.
        let kind = cgroup.0.join("cgroup.type");
        let threaded = fs::read_to_string(&kind).and_then(|found| {
            if found.trim() == "domain invalid" { fs::write(&kind, "threaded") } else { Ok(()) }
        });
        threaded.map_err(|cause| error(&kind, &cause))?;
        Ok(cgroup)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // When the agent ends in the middle of a self-test, the process that it kills is in the cgroup for a moment
        // more. One that stays longer leaves it to the next self-test.
        for _ in 0..100 {
            match fs::remove_dir(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    thread::sleep(Duration::from_millis(1));
                }
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory stands for a cgroup: both can be removed only while nothing is in them.
    #[test]
    fn what_is_left_is_removed_unless_it_is_in_use() {
        let served = tempfile::tempdir().unwrap();
        assert_eq!(remove_leftover(served.path()), None);
        let (left, child) = (served.path().join(NAME), served.path().join(NAME).join("child"));
        fs::create_dir_all(&child).unwrap();
        assert_eq!(remove_leftover(served.path()), None);
        fs::remove_dir(child).unwrap();
        assert_eq!(remove_leftover(served.path()), Some(left));
    }
}
