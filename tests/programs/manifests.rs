//! Manifests edited with the programs that people use.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use lb_core::model::Protocol::{Tcp, Udp};
use lb_tests::{
    Feature,
    client::{Domain, Socket},
    command::SetOnDrop,
    installed::{Place, QUIET, Running, eventually},
    require,
};
use nix::{errno::Errno, sys::signal::Signal};

use crate::{
    socklb::{is_up, with_town},
    town::{self, Town},
};

/// A program, and how it changes `$F` in the directory `$DIR` from the version `$OLD` to the version `$N`.
/// `$NEW` is a copy of the new version elsewhere, `$HALF` the byte in its middle, `$CUT` the start of its
/// last document. `$TMP` is a scratch directory.
const WAYS: [(&str, &str); 20] = [
    ("cp over", "cp $NEW $F"),
    ("cp --remove-destination", "cp --remove-destination $NEW $F"),
    ("mv over", "cp $NEW $DIR/.new; mv $DIR/.new $F"),
    ("sed -i", "sed -i \"s/only-$OLD/only-$N/; s/10[.]96[.]9[.]$OLD$/10.96.9.$N/; s/10[.]96[.]10[.]$OLD$/10.96.10.$N/\" $F"),
    ("rsync", "rsync $NEW $F"),
    ("rsync --inplace", "rsync --inplace $NEW $F"),
    ("vim with a backup", "mv $F $F~; sleep 0.1; cat $NEW > $F; rm $F~"),
    ("emptied, and written at once", "cat $NEW > $F"),
    ("emptied, and written later", "> $F; sleep 0.5; cat $NEW > $F"),
    ("emptied by truncate, and written later", "truncate --size 0 $F; sleep 0.5; cat $NEW > $F"),
    ("cut off by truncate, and written later", "truncate --size $HALF $F; sleep 0.5; cat $NEW > $F"),
    ("written in pieces", "{ sleep 0.4; head -c $HALF $NEW; sleep 0.4; tail -c +$((HALF + 1)) $NEW; } > $F"),
    ("written in pieces, for longer than a file is waited for", "{ head -c $CUT $NEW; sleep 3; tail -c +$((CUT + 1)) $NEW; } > $F"),
    ("written in goes", "head -c $CUT $NEW > $F; sleep 0.5; tail -c +$((CUT + 1)) $NEW >> $F"),
    ("written octet by octet", "python3 -c \"import os; [os.write(1, bytes([o])) for o in open('$NEW', 'rb').read()]\" > $F"),
    ("moved away and replaced", "mv $F $DIR/web.away; sleep 0.5; cp $NEW $F; rm $DIR/web.away"),
    ("removed and made anew", "rm $F; sleep 0.5; cp $NEW $F"),
    ("moved to another name, edited, and moved back", "mv $F $DIR/a.yaml; sleep 0.2; cp $NEW $DIR/a.yaml; sleep 0.2; mv $DIR/a.yaml $F"),
    (
        "git checkout",
        "git init --quiet $TMP; cd $TMP; export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a
         cp $F web.yaml; git add .; git commit --quiet -m 1; git tag old; cp $NEW web.yaml; git commit --quiet -am 2; git tag new
         export GIT_WORK_TREE=$DIR GIT_DIR=$TMP/.git; git reset --quiet old; git checkout --quiet new",
    ),
    (
        "a mounted ConfigMap",
        "cd $DIR; mkdir ..1 ..2; cp $F ..1; cp $NEW ..2/web.yaml; ln -s ..1 ..data; ln -s ..data/web.yaml .link; mv -T .link $F
         sleep 0.5; ln -s ..2 ..data_tmp; mv -T ..data_tmp ..data; rm -r ..1",
    ),
];

/// The same for editors, run or replayed by their system calls, for other tools, and for several files.
const MORE_WAYS: [(&str, &str); 18] = [
    // Both test whether the directory is writable (4913), and have a swap file.
    (
        "vim with backupcopy=yes",
        ": > $DIR/4913; rm $DIR/4913
         if command -v vim > /dev/null; then vim -es -u NONE -N -c 'set backup backupcopy=yes' -c '%d' -c \"0r $NEW\" -c wq $F < /dev/null
         else : > $DIR/.web.yaml.swp; cp $F $F~; cat $NEW > $F; rm $DIR/.web.yaml.swp; fi; rm -f $F~",
    ),
    (
        "vim with backupcopy=no",
        ": > $DIR/4913; rm $DIR/4913
         if command -v vim > /dev/null; then vim -es -u NONE -N -c 'set backup backupcopy=no' -c '%d' -c \"0r $NEW\" -c wq $F < /dev/null
         else : > $DIR/.web.yaml.swp; mv $F $F~; cat $NEW > $F; rm $DIR/.web.yaml.swp; fi; rm -f $F~",
    ),
    ("nano with a backup", ": > $DIR/.web.yaml.swp; cp -p $F $F~; cat $NEW > $F; rm $DIR/.web.yaml.swp $F~"),
    (
        "emacs",
        "ln -s me@host.1 $DIR/.#web.yaml; cp $NEW $DIR/\\#web.yaml\\#; mv $F $F~; sleep 0.05; cat $NEW > $F; rm $DIR/\\#web.yaml\\# $DIR/.#web.yaml; rm $F~",
    ),
    ("gedit", "cp $NEW $DIR/.goutputstream-A1; ln $F $F~; mv $DIR/.goutputstream-A1 $F; rm $F~"),
    ("ed", "if command -v ed > /dev/null; then printf '%%d\\n0r %s\\nw\\nq\\n' $NEW | ed -s $F; else cat $NEW > $F; fi"),
    ("kubectl get -o yaml > file", "{ sleep 0.7; cat $NEW; } > $F"),
    ("perl -i", "export NEW; perl -i -ne 'if ($. == 1) { open N, \"<\", $ENV{NEW}; print <N> }' $F"),
    ("patch", "diff -u $F $NEW > $TMP/patch || :; patch --silent $F $TMP/patch"),
    ("install", "install -m 600 $NEW $F"),
    ("tar -x", "cp $NEW $TMP/web.yaml; tar -C $TMP -c web.yaml | tar -C $DIR -x"),
    ("dd over the old text, and cut off where it ends", "dd if=$NEW of=$F conv=notrunc bs=100 status=none; sleep 0.3; truncate --size $(stat -c %s $NEW) $F"),
    (
        "a large text, copied, and shortened by sed -i",
        "{ yes '# padding' | head -c 8000000; echo; cat $NEW; } > $TMP/large; cp $TMP/large $F; sed -i '/^# padding/d' $F",
    ),
    (
        "git checkout that renames",
        "git init --quiet $TMP; cd $TMP; export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a
         cp $F web.yaml; git add .; git commit --quiet -m 1; git tag old; git mv web.yaml b.yaml; git commit --quiet -m 2; git tag moved
         git mv b.yaml web.yaml; cp $NEW web.yaml; git commit --quiet -am 3; git tag new
         export GIT_WORK_TREE=$DIR GIT_DIR=$TMP/.git; git reset --quiet old; git checkout --quiet moved; sleep 0.5; git checkout --quiet new",
    ),
    ("a name that is no manifest's, and back", "mv $F $F.bak; sleep 1; cp $NEW $F.bak; mv $F.bak $F"),
    (
        "two files that are swapped",
        "head -c $CUT $NEW > $DIR/.a; tail -c +$((CUT + 1)) $NEW > $DIR/.b; mv $DIR/.b $DIR/b.yaml; mv $DIR/.a $F; sleep 0.3
         mv $F $DIR/.swap; sleep 0.3; mv $DIR/b.yaml $F; sleep 0.3; mv $DIR/.swap $DIR/b.yaml; sleep 1.5
         cp $NEW $DIR/.c; mv $DIR/.c $F; rm $DIR/b.yaml",
    ),
    (
        "an object that moves to another file, which is written later",
        "head -c $CUT $NEW > $F; sleep 0.5; tail -c +$((CUT + 1)) $NEW > $DIR/b.yaml; sleep 2; cp $NEW $F; rm $DIR/b.yaml",
    ),
    ("rsync --delete of the folder", "cp $NEW $TMP/web.yaml; rsync --archive --checksum --delete --delete-before $TMP/ $DIR/"),
];

/// Services whose calls must succeed, one that differs between versions, and one that only this version has.
/// A cut off file would lose endpoints of the last document.
fn manifest(town: &Town, version: usize) -> String {
    let service = |name: &str, ip: &str, protocol: &str, port: u16| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  ports:\n  - port: {port}\n    protocol: {protocol}\n  \
             clusterIP: {ip}\n"
        )
    };
    let slice = |name: &str, protocol: &str, port: u16| {
        let endpoints: Vec<String> =
            town.pods.iter().map(|pod| format!("- addresses:\n  - {}\n", pod.ips[0])).collect();
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-1\n  labels:\n    \
             kubernetes.io/service-name: {name}\naddressType: IPv4\nports:\n- name: ''\n  port: {port}\n  protocol: \
             {protocol}\nendpoints:\n{}",
            endpoints.concat()
        )
    };
    [
        service("marker", &format!("10.96.9.{version}"), "TCP", 80),
        service("dns", "10.96.0.53", "UDP", 53),
        slice("dns", "UDP", 1053),
        service(&format!("only-{version}"), &format!("10.96.10.{version}"), "TCP", 80),
        service("web", "10.96.0.80", "TCP", 80),
        slice("web", "TCP", town::HTTP),
    ]
    .join("---\n")
}

fn connect(to: SocketAddr) -> Result<(), Errno> {
    Socket::new(Domain::V4, Tcp).connect(to)
}

/// Calls while the file changes from one version to the next. Returns the errors.
fn change(file: &Path, town: &Town, version: usize, way: &str) -> Vec<String> {
    let folder = file.parent().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let new = temp.path().join("new");
    let content = manifest(town, version);
    fs::write(&new, &content).unwrap();
    let own = temp.path().join("own");
    fs::create_dir(&own).unwrap();
    let socket = Socket::new(Domain::V4, Udp);
    socket.connect(town::dns()[0]).unwrap();
    socket.set_nonblocking(true);
    let (is_over, wrong) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let at = |version: usize, third: u8| format!("10.96.{third}.{version}:80").parse().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let started = Instant::now();
            while !is_over.load(Relaxed) {
                if let Err(error) = connect(town::web()[0]) {
                    wrong.lock().unwrap().push(format!("web: {error} after {:?}", started.elapsed()));
                }
                match socket.receive() {
                    Err(Errno::EAGAIN) => {}
                    other => {
                        wrong.lock().unwrap().push(format!("dns: {other:?} after {:?}", started.elapsed()));
                    }
                }
                // The pods' servers start a thread for each connection.
                thread::sleep(Duration::from_millis(5));
            }
        });
        let _ends_the_calls = SetOnDrop(&is_over);
        let status = Command::new("sh")
            .args(["-ec", way])
            .env("F", file)
            .env("DIR", folder)
            .env("NEW", &new)
            .env("TMP", &own)
            .env("OLD", (version - 1).to_string())
            .env("N", version.to_string())
            .env("HALF", (content.len() / 2).to_string())
            .env("CUT", content.rfind("---\n").unwrap().to_string())
            .status()
            .unwrap();
        assert!(status.success(), "{way}: {status}");
        eventually(&format!("the new version is served after: {way}"), || {
            connect(at(version, 9)) == Err(Errno::ECONNREFUSED)
                && connect(at(version, 10)) == Err(Errno::ECONNREFUSED)
        });
        eventually(&format!("the old version is not served after: {way}"), || {
            connect(at(version - 1, 9)) == Err(Errno::ENETUNREACH)
                && connect(at(version - 1, 10)) == Err(Errno::ENETUNREACH)
        });
    });
    assert_eq!(socket.peer_name(), Ok(town::dns()[0]));
    wrong.into_inner().unwrap()
}

/// An agent whose manifest is version 0, in this file.
fn serve_file(place: &Place, town: &Town, file: &Path, flags: &[&str]) -> Running {
    fs::write(file, manifest(town, 0)).unwrap();
    let agent = place.start(&[&QUIET[..], flags].concat());
    eventually("the service answers", || is_up(town::web()[0]));
    agent
}

fn serve(place: &Place, town: &Town) -> Running {
    serve_file(place, town, &place.manifests().join("web.yaml"), &[])
}

/// Changes the manifest of [`serve`] in each way; fails with the ways during which a call failed.
fn change_in_all(place: &Place, town: &Town, ways: &[(&str, &str)]) {
    let mut wrong = Vec::new();
    for (version, (name, way)) in (1..).zip(ways) {
        let found = change(&place.manifests().join("web.yaml"), town, version, way);
        wrong.extend(found.first().map(|first| format!("{name}: {} times, first {first}", found.len())));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_service_is_gone_while_its_manifest_is_changed_in_any_way() {
    if !["rsync", "git", "python3"].into_iter().all(|program| require(Feature::Command(program))) {
        return;
    }
    with_town(|place, town| {
        let agent = serve(place, town);
        change_in_all(place, town, &WAYS);
        let (_, log) = agent.end_with_log(Signal::SIGTERM);
        for version in 0..WAYS.len() {
            let gone = format!("Service default/only-{version} is no longer served: ");
            assert_eq!(log.iter().filter(|line| line.contains(&gone)).count(), 1, "{version}: {log:#?}");
        }
        let n_gone = log.iter().filter(|line| line.contains("no longer served")).count();
        assert_eq!(n_gone, WAYS.len(), "{log:#?}");
    });
}

#[test]
fn no_service_is_gone_under_editors_and_other_tools() {
    if !["rsync", "git", "perl", "patch"].into_iter().all(|program| require(Feature::Command(program))) {
        return;
    }
    with_town(|place, town| {
        let _agent = serve(place, town);
        change_in_all(place, town, &MORE_WAYS);
    });
}

/// How `$DIR`, the source's path, becomes another directory. `$F` is a file in it.
const WAYS_OF_FOLDERS: [(&str, &str); 5] = [
    ("a link to another folder, exchanged", "mkdir $DIR.2; cp $NEW $DIR.2/web.yaml; mv $DIR $DIR.1; ln -s $DIR.1 $DIR; sleep 0.3
      ln -s $DIR.2 $DIR.new; mv -T $DIR.new $DIR; sleep 0.3; rm -r $DIR.1; rm $DIR; mv $DIR.2 $DIR"),
    ("ln -sfn", "mkdir $DIR.2; cp $NEW $DIR.2/web.yaml; mv $DIR $DIR.1; ln -sfn $DIR.1 $DIR; sleep 0.3; ln -sfn $DIR.2 $DIR; sleep 0.3
      rm -r $DIR.1; rm $DIR; mv $DIR.2 $DIR"),
    ("mv of the folder", "mkdir $DIR.2; cp $NEW $DIR.2/web.yaml; mv $DIR $DIR.1; sleep 3; mv $DIR.2 $DIR; rm -r $DIR.1"),
    ("rm -r, and cp -r", "mkdir $DIR.2; cp $NEW $DIR.2/web.yaml; rm -r $DIR; sleep 3; cp -r $DIR.2 $DIR; rm -r $DIR.2"),
    ("rm -r file by file, and made anew", "rm $F; sleep 0.5; rm -r $DIR; sleep 3; mkdir $DIR; sleep 0.5; cp $NEW $F"),
];

#[test]
fn no_service_is_gone_while_the_folder_becomes_another() {
    with_town(|place, town| {
        let folder = place.manifests().join("folder");
        fs::create_dir(&folder).unwrap();
        let file = folder.join("web.yaml");
        let _agent = serve_file(place, town, &file, &[&format!("--source=file:{}", folder.display())]);
        for (version, (name, way)) in (1..).zip(WAYS_OF_FOLDERS) {
            assert_eq!(change(&file, town, version, way), Vec::<String>::new(), "{name}");
        }
    });
}

/// Writers that never pause: whatever is read in between, what all versions have is served.
#[test]
fn no_service_is_gone_under_writers_without_rest() {
    let way = "i=0
        pause() { sleep 0.0$(((i * 7 + $1 * 13) % 90 + 10)); }
        while [ $i -lt 60 ]; do
            i=$((i + 1))
            case $((i * 11 % 10)) in
            0) cp $NEW $F;;
            1) cp $NEW $DIR/.new; pause 1; mv $DIR/.new $F;;
            2) > $F; pause 2; cat $NEW > $F;;
            3) { head -c $((HALF * i / 60)) $NEW; pause 3; tail -c +$((HALF * i / 60 + 1)) $NEW; } > $F;;
            4) truncate --size $((HALF * i / 30)) $F; pause 4; cp $NEW $F;;
            5) mv $F $F~; pause 5; cp $NEW $F; pause 6; rm $F~;;
            6) rm $F; pause 7; cp $NEW $F;;
            7) head -c $CUT $NEW > $F; pause 8; tail -c +$((CUT + 1)) $NEW >> $F;;
            8) mv $F $DIR/a.yaml; pause 9; cp $NEW $F; rm $DIR/a.yaml;;
            9) dd if=$NEW of=$F conv=notrunc bs=50 status=none;;
            esac
            pause 10
        done
        cp $NEW $F";
    with_town(|place, town| {
        let _agent = serve(place, town);
        for version in 1..4 {
            assert_eq!(change(&place.manifests().join("web.yaml"), town, version, way), Vec::<String>::new());
        }
    });
}

/// The same for a manifest that is the whole source.
#[test]
fn no_service_is_gone_while_a_single_manifest_is_changed() {
    with_town(|place, town| {
        let file = place.manifests().join("web.yaml");
        let _agent = serve_file(place, town, &file, &[&format!("--source=file:{}", file.display())]);
        let names =
            ["mv over", "emptied, and written later", "moved away and replaced", "removed and made anew"];
        let ways = WAYS.iter().filter(|(name, _)| names.contains(name));
        for (version, (name, way)) in (1..).zip(ways) {
            assert_eq!(change(&file, town, version, way), Vec::<String>::new(), "{name}");
        }
    });
}

/// The services of a deleted file are soon removed, and that is logged.
#[test]
fn a_manifest_that_is_removed_takes_its_services_along() {
    with_town(|place, town| {
        let agent = serve(place, town);
        fs::remove_file(place.manifests().join("web.yaml")).unwrap();
        eventually("nothing answers", || connect(town::web()[0]) == Err(Errno::ENETUNREACH));
        let (_, log) = agent.end_with_log(Signal::SIGTERM);
        let gone: Vec<&String> = log.iter().filter(|line| line.contains("no longer served")).collect();
        assert_eq!(gone.len(), 1, "{log:#?}");
        for part in
            ["EndpointSlice default/web-1", "Service default/web", "file web.yaml was removed or renamed"]
        {
            assert!(gone[0].contains(part), "{}", gone[0]);
        }
    });
}

/// A file that is broken when an agent starts is served as by the last agent, even after a reboot.
#[test]
fn a_manifest_that_is_broken_at_the_start_is_served_as_it_was() {
    with_town(|place, town| {
        let agent = serve(place, town);
        let snapshot = place.state_dir().join("snapshot");
        eventually("the snapshot is written", || snapshot.exists());
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        let kept = place.state_dir().with_extension("kept");
        fs::rename(place.state_dir(), &kept).unwrap();
        // The maps are empty, as after a reboot.
        place.text(&["cleanup"]);
        fs::rename(&kept, place.state_dir()).unwrap();
        let file = place.manifests().join("web.yaml");
        fs::write(&file, format!("{}---\nkind: [", manifest(town, 1))).unwrap();
        fs::write(place.manifests().join("good.yaml"), manifest(town, 0).split("---\n").next().unwrap())
            .unwrap();

        let agent = place.start(&QUIET);
        eventually("the service answers", || is_up(town::web()[0]));
        // Longer than any waiting time of the agent.
        thread::sleep(Duration::from_secs(4));
        assert!(is_up(town::web()[0]));
        let log = agent.log();
        let told =
            log.iter().filter(|line| line.contains("web.yaml") && line.contains("stay in force (since"));
        assert_eq!(told.count(), 1, "{log:#?}");
        let status = place.run(&[&["status", "--cgroup", &place.cgroup], &QUIET[..2]].concat());
        let told = String::from_utf8_lossy(&status.stdout).into_owned();
        let outdated = told.lines().find(|line| line.starts_with("outdated")).unwrap_or_default();
        assert!(outdated.contains("web.yaml") && outdated.contains("(since "), "{told}");
        assert_eq!(status.status.code(), Some(3), "{told}");
        fs::write(&file, manifest(town, 2)).unwrap();
        eventually("the repaired one is served", || {
            connect("10.96.10.2:80".parse().unwrap()) == Err(Errno::ECONNREFUSED)
                && connect("10.96.10.0:80".parse().unwrap()) == Err(Errno::ENETUNREACH)
        });
        assert!(is_up(town::web()[0]));
    });
}
