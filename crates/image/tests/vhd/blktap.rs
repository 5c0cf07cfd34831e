//! Images that blktap's own tool makes and checks. It is in no distribution that we know: where `vhd-util` is not on the path,
//! these tests say so and end.

use super::*;

/// Runs `vhd-util`, which must succeed; gives what it printed. None where there is no such program.
fn vhd_util(arguments: &[&str]) -> Option<String> {
    match Command::new("vhd-util").args(arguments).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "vhd-util {arguments:?}: {text}");
            Some(text)
        }
        Err(error) => {
            eprintln!("skipped: vhd-util cannot be run ({error})");
            None
        }
    }
}

/// What `vhd-util` finds wrong is told as an exit status.
fn check(path: &Path) {
    vhd_util(&["check", "-n", text(path), "-b"]).unwrap();
}

/// The disk of an image over another, or alone.
async fn pair(handle: &Handle, path: &Path, below: Option<&Path>) -> Chain {
    let top = open_image(handle, file(handle, path), true).await.unwrap();
    let mut others: Vec<Rc<dyn Image>> = Vec::new();
    if let Some(below) = below {
        others.push(Rc::new(open_image(handle, file(handle, below), false).await.unwrap()));
    }
    Chain::over(handle, Rc::new(top), others)
}

/// Writes to a disk; gives all its bytes.
fn use_it(path: &Path, below: Option<&Path>, seed: u64, mut model: Vec<u8>) -> Vec<u8> {
    let (path, below) = (path.to_owned(), below.map(Path::to_owned));
    run(async move |handle| {
        let disk = pair(&handle, &path, below.as_deref()).await;
        assert!(all_of(&disk).await == model, "before");
        change(&disk, &mut model, &mut Random(seed), 60).await;
        disk.close().await.unwrap();
        model
    })
}

#[test]
fn images_of_vhd_util_still_pass_its_check_after_we_have_written_them() {
    let folder = folder();
    let (base, top) = (folder.path().join("base.vhd"), folder.path().join("top.vhd"));
    // With room in its table to grow.
    if vhd_util(&["create", "-n", text(&base), "-s", "10", "-S", "100"]).is_none() {
        return;
    }
    let model = use_it(&base, None, 1, vec![0; 10 << 20]);
    check(&base);
    assert!(bytes_by_qemu(&base) == model);
    // It grows in their way, and in ours.
    vhd_util(&["resize", "-n", text(&base), "-s", "14", "-f"]);
    let mut model = model;
    for size in [14, 90, 300] {
        model.resize(size << 20, 0);
        let path = base.clone();
        run(async move |handle| vhd::resize(&file(&handle, &path), (size as u64) << 20).await.unwrap());
        check(&base);
        model = use_it(&base, None, size as u64, model);
        check(&base);
    }
    vhd_util(&["snapshot", "-n", text(&top), "-p", text(&base)]);
    let model = use_it(&top, Some(&base), 2, model);
    check(&top);
    vhd_util(&["check", "-n", text(&top), "-p"]);
    // It puts what we have written into the image below.
    vhd_util(&["coalesce", "-n", text(&top)]);
    check(&base);
    assert!(bytes_by_qemu(&base) == model);
    // Where that had no block it says now which ones are full.
    let path = base.clone();
    let report = run(async move |handle| vhd::check(&file(&handle, &path), Repair::No).await.unwrap());
    assert!(report.is_safe(), "{report:?}");
    let model = use_it(&base, None, 3, model);
    check(&base);
    let journal = folder.path().join("journal");
    vhd_util(&["resize", "-n", text(&base), "-s", "3000", "-j", text(&journal)]);
    let path = base.clone();
    run(async move |handle| {
        let bytes = all_of(&disk(&handle, &path, false).await).await;
        let (old, new) = bytes.split_at(model.len());
        assert!(old == model && new.iter().all(|byte| *byte == 0));
    });
}

#[test]
fn vhd_util_takes_what_we_make() {
    for size in [10 * MIB, 10 * MIB + 512, 1000 * MIB, 127 << 30, 2040 << 30] {
        let folder = folder();
        let (base, top) = (folder.path().join("base.vhd"), folder.path().join("top.vhd"));
        make(&base, Create { size, unique_id: Some([7; 16]), ..Create::default() }).unwrap();
        if vhd_util(&["check", "-n", text(&base), "-b"]).is_none() {
            return;
        }
        let parent = Parent {
            name: "base.vhd".to_owned(),
            unique_id: Some([7; 16]),
            changed: std::time::SystemTime::now(),
        };
        let create =
            Create { size, subformat: Subformat::Differencing, parent: Some(parent), ..Create::default() };
        make(&top, create).unwrap();
        vhd_util(&["check", "-n", text(&top), "-b", "-p"]);
        let fixed = folder.path().join("fixed.vhd");
        make(&fixed, Create { size, subformat: Subformat::Fixed, ..Create::default() }).unwrap();
        check(&fixed);
        let depth = vhd_util(&["query", "-n", text(&top), "-d"]).unwrap();
        assert!(depth.contains("chain depth: 2"), "{depth}");
    }
}
