//! HTTPS: with a certificate that changes while the gateway runs, and with peers that speak no TLS.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use router::TlsFiles;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::mock::{Gateway, PATIENCE, config, says};

/// Makes a certificate into `files`; returns who trusts it.
fn make(files: &TlsFiles) -> RootCertStore {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    fs::write(&files.cert, made.cert.pem()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    roots
}

fn files(folder: &Path) -> TlsFiles {
    fs::create_dir_all(folder).unwrap();
    TlsFiles { cert: folder.join("cert.pem"), key: folder.join("key.pem") }
}

/// The first line of the answer to `GET /live`, from a server that `roots` trusts.
async fn live(gateway: &Gateway, roots: &RootCertStore) -> Result<String, std::io::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let client = client.with_root_certificates(roots.clone()).with_no_client_auth();
    let address = gateway.url.trim_start_matches("http://");
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = TlsConnector::from(Arc::new(client)).connect(name, stream).await?;
    stream.write_all(b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn a_certificate_is_renewed_without_a_restart() {
    let folder = std::env::temp_dir().join(format!("baton-gateway-tls-{}", std::process::id()));
    let files = files(&folder);
    let first = make(&files);
    let mut config = config();
    config.tls = Some(files.clone());
    let gateway = Gateway::with(config, |_| says("x")).await;
    assert_eq!(live(&gateway, &first).await.unwrap(), "HTTP/1.1 200 OK");
    assert!(live(&gateway, &RootCertStore::empty()).await.is_err(), "trusted by nobody");

    // Someone who speaks no TLS is turned away, and disturbs nobody.
    let mut plain = TcpStream::connect(gateway.url.trim_start_matches("http://")).await.unwrap();
    plain.write_all(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP/"), "{answer:?}");

    // Half a file changes nothing.
    fs::write(&files.cert, "-----BEGIN CERTIFICATE-----\n").unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    assert_eq!(live(&gateway, &first).await.unwrap(), "HTTP/1.1 200 OK");
    let second = make(&files);
    let begun = Instant::now();
    while live(&gateway, &second).await.is_err() {
        assert!(begun.elapsed() < PATIENCE, "never read again");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(live(&gateway, &first).await.is_err(), "the old one is still served");
    fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn files_that_do_not_fit_are_named() {
    let folder = std::env::temp_dir().join(format!("baton-gateway-tls-wrong-{}", std::process::id()));
    let (one, other) = (files(&folder.join("1")), files(&folder.join("2")));
    make(&one);
    make(&other);
    for (cert, key, part) in [
        (one.cert.clone(), other.key.clone(), "does not belong to"),
        (folder.join("none"), one.key.clone(), "none: cannot be read: "),
        (one.cert.clone(), one.cert.clone(), "no private key in PEM"),
        ("/dev/zero".into(), one.key.clone(), "/dev/zero: cannot be read: more than 4194304 bytes"),
        (one.cert.clone(), "/dev/zero".into(), "/dev/zero: cannot be read: more than 4194304 bytes"),
        (one.key.clone(), one.key.clone(), "no certificate in PEM"),
    ] {
        let mut config = config();
        config.tls = Some(TlsFiles { cert, key });
        let gateway = Gateway::with(config, |_| says("x")).await;
        let error = gateway.served.await.unwrap().unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    fs::remove_dir_all(folder).unwrap();
}
