//! Promise: a router serves whoever has a key and nobody else; `baton key` makes and revokes keys while it runs.

use std::fs;
use std::time::Instant;

use crate::client::builder;
use crate::harness::{LOOK, PATIENCE, baton, folder, output};
use crate::parts::Parts;

#[tokio::test]
async fn made_used_and_revoked() {
    let folder = folder("keys");
    let file = folder.join("keys.json").display().to_string();
    let key = |arguments: &[&str]| {
        let (ok, stdout, stderr) = output(baton(&["key", "--file", &file]).args(arguments));
        assert!(ok, "{stderr}");
        (stdout, stderr)
    };
    let (alice, stderr) = key(&["create", "alice", "--requests-per-minute=100"]);
    assert!(alice.starts_with("sk-baton-") && stderr.contains(&file), "{alice}{stderr}");
    let router = Parts::router(&[&format!("--key-file={file}")]);
    let http = builder().build().expect("a client");
    let ask = async |key: &str, host: Option<&str>| {
        let request = http.get(router.url("/v1/models")).bearer_auth(key.trim()).timeout(PATIENCE);
        let request = match host {
            Some(host) => request.header("host", host),
            None => request,
        };
        request.send().await.ok().map(|answer| answer.status().as_u16())
    };
    // A router follows its file within seconds; at the beginning it must come up.
    let until = async |key: &str, wanted: u16| {
        let begun = Instant::now();
        while ask(key, None).await != Some(wanted) {
            assert!(begun.elapsed() < PATIENCE, "never {wanted}");
            tokio::time::sleep(LOOK).await;
        }
    };
    until(&alice, 200).await;
    assert_eq!(ask("sk-baton-wrong", None).await, Some(401));
    let (ok, _, stderr) = output(baton(&["chat", "--url", &router.url(""), "--api-key=wrong"]).arg("Hi"));
    assert!(!ok && stderr.ends_with("(--api-key or BATON_API_KEY)\n"), "{stderr}");
    // A name of somebody else's that leads to this machine.
    assert_eq!(ask(&alice, Some("evil.example")).await, Some(403));
    let (bob, _) = key(&["create", "bob"]);
    until(&bob, 200).await;
    key(&["revoke", "alice"]);
    until(&alice, 401).await;
    assert_eq!(ask(&bob, None).await, Some(200));
    let (list, _) = key(&["list"]);
    assert!(list.contains("alice  revoked") && list.contains("bob    active"), "{list}");
    assert!(!fs::read_to_string(&file).expect("a file").contains(bob.trim().trim_start_matches("sk-baton-")));
    drop(router);
    fs::remove_dir_all(folder).expect("cleans up");
}

/// What is refused leaves nothing behind: neither a lock nor a cluster.
#[test]
fn refusals_leave_no_files() {
    let folder = folder("no-keys");
    let at = |name: &str| folder.join(name).display().to_string();
    let (file, cluster) = (at("deep/keys.json"), at("cluster"));
    for (arguments, reason) in [
        (
            ["key", "--file", &file, "create", "a b"],
            "a key's name is 1 to 64 letters, digits or any of . _ - @",
        ),
        (["key", "--file", &file, "revoke", "alice"], "no keys: "),
        (["token", "--cluster-dir", &cluster, "create", ""], "a token's name is 1 to 64 letters"),
        (["token", "--cluster-dir", &cluster, "revoke", "macs"], "no join tokens in "),
    ] {
        let (ok, stdout, stderr) = output(&mut baton(&arguments));
        assert!(!ok && stdout.is_empty() && stderr.contains(reason), "{arguments:?}: {stdout}{stderr}");
    }
    for (arguments, none) in [
        (["key", "--file", &file, "list"], "no keys; `baton key create NAME` makes one\n"),
        (
            ["token", "--cluster-dir", &cluster, "list"],
            "no join tokens; `baton token create NAME` makes one\n",
        ),
    ] {
        let (ok, stdout, _) = output(&mut baton(&arguments));
        assert_eq!((ok, stdout.as_str()), (true, none));
    }
    let left: Vec<_> = fs::read_dir(&folder).expect("lists").collect();
    assert!(left.is_empty(), "{left:?}");
    fs::remove_dir_all(folder).expect("cleans up");
}
